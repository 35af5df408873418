"""What tests share: cases, oracles, tolerances, and tiny models. Nothing here is imported by the package itself."""
