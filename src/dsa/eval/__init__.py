"""Measuring what sparse attention keeps of a dense model: perplexity, attention mass, time and memory."""
