"""Multi-head latent attention: sparse, with a model's own indexers or with new ones, and its export."""
