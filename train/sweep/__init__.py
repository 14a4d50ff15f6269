"""Many runs from one file: read, checked, trained one after the other, evaluated, compared."""
