"""`dsa check`: what attaching must keep, tried on a small random model of any configuration."""
