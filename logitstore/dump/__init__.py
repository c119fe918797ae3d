"""The torch side of the service: documents to tokens, models to rows and losses, Ray actors around them."""
