"""How good a backbone is. Evaluation reads weights; it never touches training state."""
