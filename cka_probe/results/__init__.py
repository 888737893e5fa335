"""What a comparison found, and what to say of it."""
