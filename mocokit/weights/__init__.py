"""What a user names, read: weights, the network they are of, the views it expects; and written."""
