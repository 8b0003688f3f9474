"""A repository's layout and code; pushing, completing and describing repositories."""
