//! The decision core of SEDAC.
#![forbid(unsafe_code)]
pub mod accumulator;
mod error;
#[cfg(feature = "python")]
mod python;
pub use error::Error;
