"""What models are worth on texts they have not seen: plain records, no plots."""
