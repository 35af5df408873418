"""Budgets by quality: `K` per layer, layers left dense, layers that share, measured on the user's own text."""
