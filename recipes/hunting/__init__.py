"""The hunt for wrong labels: data with flipped labels, the fits that are asked, and every score of suspicion."""
