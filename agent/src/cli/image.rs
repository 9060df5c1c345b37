//! `longshore image`: images of the built-in runtime.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Output, unimplemented};

/// Arguments of `longshore image`.
#[derive(Debug, Args)]
pub struct ImageArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Import images from a docker-archive or OCI layout tar (`-` for standard input)
    Import {
        /// The archive.
        file: PathBuf,
    },
    /// Pull an image from its registry
    Pull {
        /// The image's name.
        reference: String,
    },
    /// List images
    Ls,
    /// Remove an image
    Rm {
        /// The image's name or id.
        reference: String,
    },
}

/// Runs `longshore image`.
pub(super) fn run(args: ImageArgs, _output: Output) -> anyhow::Result<()> {
    Err(unimplemented(match args.verb {
        Verb::Import { .. } => "image import",
        Verb::Pull { .. } => "image pull",
        Verb::Ls => "image ls",
        Verb::Rm { .. } => "image rm",
    }))
}
