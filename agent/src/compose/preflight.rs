//! What the configuration refuses to run on: swap (`failSwapOn`), cgroup v1 (`failCgroupV1`) and kernel
//! settings (`protectKernelDefaults`), as kubelet does before it takes a pod.

use anyhow::bail;

use crate::config::ResourceConfig;
use crate::node::cpu_set::CpuSet;
use crate::node::machine;

/// Kernel settings that kubelet counts on, by their path below /proc/sys.
const SYSCTLS: [(&str, i64); 6] = [
    ("vm/overcommit_memory", 1),
    ("vm/panic_on_oom", 0),
    ("kernel/panic", 10),
    ("kernel/panic_on_oops", 1),
    ("kernel/keys/root_maxkeys", 1_000_000),
    ("kernel/keys/root_maxbytes", 25_000_000),
];

/// What is so on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    swap_on: bool,
    unified: bool,
    cpus: CpuSet,
    /// As text, in the order of `SYSCTLS`; or why it cannot be read.
    sysctls: Vec<Result<String, String>>,
}

/// Why the node must not run, one line each.
fn plan_refusals(config: &ResourceConfig, facts: &Facts) -> Vec<String> {
    let mut refusals = Vec::new();
    if config.fail_swap_on && facts.swap_on {
        refusals.push(
            "swap is on and KubeletConfiguration.failSwapOn is true; run swapoff -a and take swap \
             out of /etc/fstab, or set failSwapOn to false"
                .to_owned(),
        );
    }
    if config.fail_cgroup_v1 && !facts.unified {
        refusals.push(
            "this machine has cgroup v1 and KubeletConfiguration.failCgroupV1 is true; boot with \
             systemd.unified_cgroup_hierarchy=1, or leave it out: cgroup v1 works here"
                .to_owned(),
        );
    }
    if config.single_process_oom_kill == Some(false) && !facts.unified {
        refusals.push(
            "KubeletConfiguration.singleProcessOOMKill is false, which needs cgroup v2; leave it \
             out, or boot with systemd.unified_cgroup_hierarchy=1"
                .to_owned(),
        );
    }
    if !config.reserved_cpus.is_within(&facts.cpus) {
        refusals.push(format!(
            "KubeletConfiguration.reservedSystemCPUs {} is not within the CPUs that are online ({})",
            config.reserved_cpus, facts.cpus
        ));
    }
    if config.protect_kernel_defaults {
        for ((path, wanted), found) in SYSCTLS.iter().zip(&facts.sysctls) {
            let name = path.replace('/', ".");
            match found {
                Ok(value) if *value == wanted.to_string() => {}
                Ok(value) => refusals.push(format!(
                    "{name} is {value} and KubeletConfiguration.protectKernelDefaults wants \
                     {wanted}; put {name}={wanted} into a file in /etc/sysctl.d and run sysctl --system"
                )),
                Err(error) => refusals.push(format!(
                    "{name}, which KubeletConfiguration.protectKernelDefaults wants to be {wanted}, \
                     cannot be read: {error}"
                )),
            }
        }
    }
    refusals
}

/// Looks at the machine.
///
/// # Errors
/// It is not as the configuration asks for; all of it is told together.
pub(super) fn check(config: &ResourceConfig) -> anyhow::Result<()> {
    let read = |(path, _): &(&str, i64)| {
        let text = std::fs::read_to_string(format!("/proc/sys/{path}"));
        text.map(|text| text.trim().to_owned()).map_err(|error| error.to_string())
    };
    let facts = Facts {
        swap_on: machine::swap_is_on(),
        unified: machine::is_unified(),
        cpus: machine::online_cpus(),
        sysctls: SYSCTLS.iter().map(read).collect(),
    };
    if config.limited_swap && !facts.unified {
        tracing::warn!(
            "memorySwap.swapBehavior LimitedSwap needs cgroup v2; containers get no swap here"
        );
    }
    match &*plan_refusals(config, &facts) {
        [] => Ok(()),
        refusals => bail!("this machine is not as configured: {}", refusals.join("\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_is_not_as_configured_is_refused_with_every_reason() {
        let right: Vec<_> = SYSCTLS.iter().map(|(_, value)| Ok(value.to_string())).collect();
        let cpus: CpuSet = "0-3".parse().unwrap();
        let good = Facts { swap_on: false, unified: true, cpus, sysctls: right.clone() };
        let strict = ResourceConfig {
            fail_swap_on: true,
            fail_cgroup_v1: true,
            protect_kernel_defaults: true,
            single_process_oom_kill: Some(false),
            reserved_cpus: "0-1".parse().unwrap(),
            ..ResourceConfig::default()
        };
        assert_eq!(plan_refusals(&strict, &good), Vec::<String>::new());
        let mut wrong = right;
        wrong[0] = Ok("0".into());
        wrong[4] = Err("no such file".into());
        let cpus = "1-3".parse().unwrap();
        let bad = Facts { swap_on: true, unified: false, cpus, sysctls: wrong };
        let refusals = plan_refusals(&strict, &bad);
        for (refusal, said) in refusals.iter().zip([
            "swap is on",
            "failCgroupV1 is true",
            "singleProcessOOMKill is false",
            "reservedSystemCPUs 0-1 is not within the CPUs that are online (1-3)",
            "vm.overcommit_memory is 0 and",
            "kernel.keys.root_maxkeys, which",
        ]) {
            assert!(refusal.contains(said), "{refusal}");
        }
        assert_eq!(refusals.len(), 6);
        assert_eq!(plan_refusals(&ResourceConfig::default(), &bad), Vec::<String>::new());
    }
}
