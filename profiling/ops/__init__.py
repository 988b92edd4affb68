"""The operations of VGF, one a file: inputs, work, implementations and bounds. Benchmarks and the roofline use them."""
