"""The frozen vision tower: which it is, its pixels, its patch grid."""
