"""What people read: tables, the model card, pictures."""
