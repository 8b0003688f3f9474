"""Formats, sound and pictures of written videos; saved repositories carry none of this."""
