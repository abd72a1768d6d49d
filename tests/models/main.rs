//! Layers, models and checkpoints.

mod broken;
mod golden;
mod hub;
mod layers;
mod reference;
mod support;
mod variants;
