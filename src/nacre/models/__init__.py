"""Stock Hugging Face decoders: built on a substrate, taken apart into trunk and crown."""
