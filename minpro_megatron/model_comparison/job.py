"""The files by which a comparison and its ranks communicate, in a temporary folder."""

JOB, RESULT, ERROR, PROGRESS = "job.json", "logits.safetensors", "error.txt", "progress.txt"
