"""The lease keeper, without a mount: rules, failures, cancellation, exclusion."""
