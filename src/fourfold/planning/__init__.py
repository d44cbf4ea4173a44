"""What a model holds: bytes by role and format, before loading and after."""
