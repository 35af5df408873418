"""`dsa explain`: what a model read of a document, recorded while it reads, as one HTML file."""
