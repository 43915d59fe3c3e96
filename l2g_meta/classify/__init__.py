"""From a trained model to answers: classify images of new classes from a few examples of each."""
