"""Networks: backbones by name, projection heads, and batch norm whose groups are our own."""
