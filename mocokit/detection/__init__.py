"""Transfer to detection: Faster R-CNN with a C4 backbone, its data, training and test."""
