"""Pure tensor functions: masks, segments, ratios, KL, clip, aggregation. No collective, no vendor."""
