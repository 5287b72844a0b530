"""How a backbone is judged. A protocol reads weights; it never touches training state."""
