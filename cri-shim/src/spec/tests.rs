//! Rules of the spec, as tables.
