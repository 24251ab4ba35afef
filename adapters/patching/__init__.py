"""Changes to instances that can be taken back."""
