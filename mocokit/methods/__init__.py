"""Methods: how queries, keys and negatives come about, and the losses between them."""
