"""What users say: checked options, from Python or from files."""
