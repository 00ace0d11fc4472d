//! Scenarios and a reference model.
