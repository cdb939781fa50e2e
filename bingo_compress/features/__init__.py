"""What the teacher sees: embeddings, neighbours, bags, targets."""
