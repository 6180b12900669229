"""How important each channel, neuron and head is: one file a method."""
