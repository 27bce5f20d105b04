"""The measured comparisons; README.md is their journal."""
