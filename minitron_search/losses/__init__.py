"""What distillation minimises: the chunked output loss, its divergences, the intermediate-state loss."""
