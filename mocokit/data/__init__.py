"""Images on disk: their stable numbers, their pixels, and batches of them in an order from chance.

This room knows files, not devices: what leaves it is uint8 pixels in ordinary memory.
"""
