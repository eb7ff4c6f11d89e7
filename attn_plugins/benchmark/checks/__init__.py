"""Whether backends and devices compute what the reference form does, and how fast."""
