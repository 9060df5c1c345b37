//! `longshore reset`: takes everything away again.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::places::Places;
use super::{Output, UsageError};
use crate::join::files::Paths;
use crate::reset::{ResetRequest, Step, noted, reset};

/// Arguments of `longshore reset`.
#[derive(Debug, Args)]
pub struct ResetArgs {
    /// Do not ask
    #[arg(short, long, visible_alias = "force")]
    yes: bool,
    #[command(flatten)]
    places: Places,
    /// Logs of pods
    #[arg(long, value_name = "DIR", default_value = "/var/log/pods")]
    pod_logs_dir: PathBuf,
    /// Links to the logs of containers
    #[arg(long, value_name = "DIR", default_value = "/var/log/containers")]
    container_logs_dir: PathBuf,
    /// Cgroup that holds `kubepods`
    #[arg(long, value_name = "CGROUP", default_value = "/")]
    cgroup_root: String,
}

/// Runs `longshore reset`.
pub(super) fn run(args: ResetArgs, output: Output) -> anyhow::Result<()> {
    let yes = args.yes;
    let request = request(args)?;
    if !yes && !confirmed(&request)? {
        anyhow::bail!("nothing was changed");
    }
    if !nix::unistd::geteuid().is_root() {
        anyhow::bail!("reset removes mounts, cgroups and rules: run it as root");
    }
    let progress = |step: &Step| {
        if output == Output::Text {
            let verdict = if step.failures.is_empty() { "done" } else { "FAILED" };
            eprintln!("[reset] {}: {verdict}{}{}", step.name, dash(&step.done), step.done);
            step.failures.iter().for_each(|failure| eprintln!("[reset]   {failure}"));
        }
    };
    // The embedded runtime may be hosted to remove its pods: more than one thread.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let steps = runtime.block_on(reset(&request, &progress));
    runtime.shutdown_background();
    let failed = steps.iter().filter(|step| !step.failures.is_empty()).count();
    if output == Output::Json {
        let steps: Vec<_> = steps
            .iter()
            .map(|s| json!({"name": s.name, "done": s.done, "failures": s.failures}))
            .collect();
        writeln!(std::io::stdout().lock(), "{}", json!({"steps": steps, "failed": failed}))?;
    }
    if failed > 0 {
        anyhow::bail!("{failed} of {} steps failed; mend the causes and run it again", steps.len());
    }
    if output == Output::Text {
        writeln!(
            std::io::stdout().lock(),
            "this machine is no node any more; its Node object, if it joined a cluster, goes with: \
             kubectl delete node NAME"
        )?;
    }
    Ok(())
}

fn dash(text: &str) -> &'static str {
    if text.is_empty() { "" } else { " - " }
}

fn request(args: ResetArgs) -> anyhow::Result<ResetRequest> {
    let places = args.places;
    let kubernetes_dir = std::path::absolute(&places.kubernetes_dir)?;
    let noted = noted(&kubernetes_dir);
    let root_dir = std::path::absolute(places.root_dir(noted.as_ref()))?;
    let request = ResetRequest {
        container_runtime_endpoint: places.runtime(noted.as_ref()),
        paths: Paths { kubernetes_dir, root_dir },
        state_dir: std::path::absolute(places.state_dir)?,
        run_dir: std::path::absolute(places.run_dir)?,
        pod_logs_dir: std::path::absolute(args.pod_logs_dir)?,
        container_logs_dir: std::path::absolute(args.container_logs_dir)?,
        cgroup_root: args.cgroup_root,
        bridge: "longshore0".to_owned(),
    };
    // What is removed whole must not be a folder that a typing mistake could name.
    for dir in
        [&request.paths.root_dir, &request.state_dir, &request.run_dir, &request.pod_logs_dir]
    {
        let depth = dir.components().count();
        let dots = dir.components().any(|c| c.as_os_str() == "..");
        if depth < 3 || dots {
            let text = format!("{} is too near the root to be removed as a whole", dir.display());
            return Err(UsageError(text).into());
        }
    }
    Ok(request)
}

fn confirmed(request: &ResetRequest) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        let text = "reset asks before it removes everything; without a terminal say --yes";
        return Err(UsageError(text.to_owned()).into());
    }
    eprint!(
        "This ends all pods of this node and removes their data, {}, {}, {} and the node's \
         credentials. Go on? [y/N] ",
        request.paths.root_dir.display(),
        request.state_dir.display(),
        request.run_dir.display()
    );
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ResetArgs,
    }

    #[test]
    fn folders_near_the_root_are_refused() {
        for (line, good) in [
            ("reset --yes", true),
            ("reset --yes --root-dir /", false),
            ("reset --yes --root-dir /var", false),
            ("reset --yes --state-dir /var/lib/../../etc", false),
            ("reset --yes --run-dir /tmp/x", true),
        ] {
            let args = Line::try_parse_from(line.split_whitespace()).unwrap().args;
            assert_eq!(request(args).is_ok(), good, "{line}");
        }
    }
}
