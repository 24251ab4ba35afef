"""dbcache inside other engines, by their own plugin points."""
