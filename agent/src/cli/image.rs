//! `longshore image`: images of the container runtime.
//!
//! Pull, list and remove are CRI calls, so they work with any runtime; import writes to the
//! built-in runtime's store, running or not.

use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use cri_shim::api::AuthConfig;
use cri_shim::image::cli::{self, ImageRow};

use super::pull_progress::Progress;
use super::{Output, UsageError, command_runtime};

/// Arguments of `longshore image`.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// State of the built-in runtime
    #[arg(long, value_name = "DIR", default_value = "/var/lib/longshore", global = true)]
    state_dir: PathBuf,
    /// Run directory of the node, where the runtime's socket is
    #[arg(long, value_name = "DIR", default_value = "/run/longshore", global = true)]
    run_dir: PathBuf,
    /// Of no use here; taken so that `run`'s path flags can be given as they are
    #[arg(long, value_name = "DIR", global = true, hide = true)]
    root_dir: Option<PathBuf>,
    /// CRI socket of another runtime
    #[arg(long, value_name = "unix://PATH", global = true)]
    container_runtime_endpoint: Option<String>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Import images from a docker-archive or OCI layout tar (`-` for standard input)
    Import {
        /// The archive
        file: PathBuf,
        /// Name for an image that brings none
        #[arg(long)]
        name: Option<String>,
    },
    /// Pull an image from its registry
    Pull {
        /// The image's name
        reference: String,
        /// User at the registry; the password is read from standard input
        #[arg(long)]
        username: Option<String>,
    },
    /// List images
    Ls,
    /// Keep an image from garbage collection
    Pin {
        /// The image's name or id
        reference: String,
    },
    /// Give a pinned image back to garbage collection
    Unpin {
        /// The image's name or id
        reference: String,
    },
    /// Remove an image
    Rm {
        /// The image's name or id
        reference: String,
    },
}

/// Runs `longshore image`.
pub(super) fn run(args: ImageArgs, output: Output) -> anyhow::Result<()> {
    let external = args.container_runtime_endpoint;
    let own = matches!(args.verb, Verb::Import { .. } | Verb::Pin { .. } | Verb::Unpin { .. });
    if external.is_some() && own {
        let remedy =
            "this verb writes to the built-in runtime's store; use the other runtime's own tool";
        return Err(UsageError(remedy.into()).into());
    }
    let endpoint =
        external.unwrap_or_else(|| format!("unix://{}", args.run_dir.join("cri.sock").display()));
    let runtime = command_runtime()?;
    match args.verb {
        Verb::Import { file, name } => {
            let imported =
                runtime.block_on(cli::import(&args.state_dir, &file, name.as_deref()))?;
            print(&imported, output)
        }
        Verb::Pull { reference, username } => {
            let auth = username.map(credentials).transpose()?;
            let mut shown = Progress::new(output);
            let pull = cli::pull(&endpoint, &reference, auth, |now| shown.show(now));
            let pulled = runtime.block_on(pull);
            shown.end();
            let id = pulled?;
            say(&id, &serde_json::json!({ "id": id }), output)
        }
        Verb::Pin { reference } => {
            let id = cli::pin(&args.state_dir, &reference, true)?;
            say(&id, &serde_json::json!({ "id": id, "pinned": true }), output)
        }
        Verb::Unpin { reference } => {
            let id = cli::pin(&args.state_dir, &reference, false)?;
            say(&id, &serde_json::json!({ "id": id, "pinned": false }), output)
        }
        Verb::Ls => print(&runtime.block_on(cli::list(&endpoint))?, output),
        Verb::Rm { reference } => {
            runtime.block_on(cli::remove(&endpoint, &reference))?;
            say(&reference, &serde_json::json!({ "removed": reference }), output)
        }
    }
}

/// The password comes by standard input: an argument list is read by everybody.
fn credentials(username: String) -> anyhow::Result<AuthConfig> {
    let mut password = String::new();
    std::io::stdin()
        .take(64 << 10)
        .read_to_string(&mut password)
        .context("read the password from standard input")?;
    let password = password.trim_end_matches(['\r', '\n']).to_owned();
    Ok(AuthConfig { username, password, ..Default::default() })
}

fn print(rows: &[ImageRow], output: Output) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => {
            serde_json::to_writer(&mut out, rows)?;
            writeln!(out)?;
        }
        Output::Text => out.write_all(table(rows).as_bytes())?,
    }
    Ok(())
}

fn say(text: &str, json: &serde_json::Value, output: Output) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => writeln!(out, "{json}")?,
        Output::Text => writeln!(out, "{text}")?,
    }
    Ok(())
}

/// One line a name, so that each can be copied; an image without a name shows its digest.
fn table(rows: &[ImageRow]) -> String {
    let lines: Vec<(&str, &str, u64)> = rows
        .iter()
        .flat_map(|row| {
            let names = if row.tags.is_empty() { &row.digests } else { &row.tags };
            let names: Vec<&str> = if names.is_empty() {
                vec!["<none>"]
            } else {
                names.iter().map(|n| &**n).collect()
            };
            names.into_iter().map(|name| (name, short(&row.id), row.size))
        })
        .collect();
    let width = lines.iter().map(|(name, ..)| name.len()).max().unwrap_or(0).max(5);
    let mut text = format!("{:width$}  {:12}  SIZE\n", "IMAGE", "ID");
    for (name, id, size) in lines {
        text.push_str(&format!("{name:width$}  {id:12}  {:.1} MB\n", size as f64 / 1e6));
    }
    text
}

/// The first twelve hexadecimal digits, as container tools show ids.
fn short(id: &str) -> &str {
    let hex = id.strip_prefix("sha256:").unwrap_or(id);
    hex.get(..12).unwrap_or(hex)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_its_line() {
        let row = |id: &str, tags: &[&str]| ImageRow {
            id: id.into(),
            tags: tags.iter().map(|t| (*t).into()).collect(),
            digests: vec![],
            size: 2_100_000,
            pinned: false,
        };
        let rows =
            [row("sha256:0123456789abcdef0", &["a.example/x:1", "a.example/x:2"]), row("ab", &[])];
        let expected = "\
IMAGE          ID            SIZE
a.example/x:1  0123456789ab  2.1 MB
a.example/x:2  0123456789ab  2.1 MB
<none>         ab            2.1 MB
";
        assert_eq!(table(&rows), expected);
    }
}
