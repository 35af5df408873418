"""What every command needs and no model knows: progress, files, free memory, the machine, the documents of a run."""
