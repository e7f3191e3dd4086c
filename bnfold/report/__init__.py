"""One result model, printed in several ways. Pure: values in, text out."""
