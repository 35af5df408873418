"""A loaded model, its cache and many questions: reading prompts, writing answers, what that takes. Prints nothing."""
