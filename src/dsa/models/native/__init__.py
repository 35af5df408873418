"""Models born with DSA: attention over latents, truly sparse, in the place of a mask over dense attention."""
