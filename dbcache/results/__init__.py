"""What requests did: the summary of each lane, and the report on one page."""
