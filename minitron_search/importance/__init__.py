"""How important each channel, neuron and head is, by the methods of `methods.METHODS`."""
