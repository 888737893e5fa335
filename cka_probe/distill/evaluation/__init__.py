"""The accuracy of networks on labelled images."""
