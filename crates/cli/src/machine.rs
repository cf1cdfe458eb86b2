//! What this machine is, as far as it tells.

use std::fs;

/// The name of the CPU.
pub fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |name| name.trim().to_owned())
}

/// Instruction sets that matter here: those it has, and those it lacks.
pub fn features() -> (Vec<&'static str>, Vec<&'static str>) {
    let mut all = Vec::new();
    #[cfg(target_arch = "x86_64")]
    all.extend([
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("f16c", std::arch::is_x86_feature_detected!("f16c")),
        ("avxvnni", std::arch::is_x86_feature_detected!("avxvnni")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512bw", std::arch::is_x86_feature_detected!("avx512bw")),
        ("avx512vnni", std::arch::is_x86_feature_detected!("avx512vnni")),
    ]);
    #[cfg(target_arch = "aarch64")]
    all.extend([
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("dotprod", std::arch::is_aarch64_feature_detected!("dotprod")),
        ("i8mm", std::arch::is_aarch64_feature_detected!("i8mm")),
    ]);
    let (has, lacks): (Vec<_>, Vec<_>) = all.into_iter().partition(|(_, has): &(&str, bool)| *has);
    let names = |list: Vec<(&'static str, bool)>| list.into_iter().map(|(name, _)| name).collect();
    (names(has), names(lacks))
}

/// Logical CPUs that the affinity mask of this process allows, as the system writes them: "0-3,8".
pub fn affinity() -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    Some(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim().to_owned())
}

/// CPUs' worth of time that the control group allows. None where it sets no limit.
pub fn cgroup_cpus() -> Option<f64> {
    let text = cgroup("cpu.max", "cpu/cpu.cfs_quota_us")?;
    let mut words = text.split_whitespace().map(str::parse::<f64>);
    let quota = words.next()?.ok().filter(|quota| *quota > 0.0)?;
    let period = match words.next() {
        Some(period) => period.ok()?,
        None => fs::read_to_string("/sys/fs/cgroup/cpu/cpu.cfs_period_us").ok()?.trim().parse().ok()?,
    };
    Some(quota / period)
}

/// Bytes that the control group allows. None where it sets no limit.
pub fn cgroup_memory() -> Option<u64> {
    let limit = cgroup("memory.max", "memory/memory.limit_in_bytes")?.trim().parse().ok()?;
    (limit < 1 << 60).then_some(limit)
}

/// A setting of this process's control group, of version 2 or 1.
fn cgroup(two: &str, one: &str) -> Option<String> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or("");
    let paths = [format!("{own}/{two}"), two.to_owned(), one.to_owned()];
    paths.iter().find_map(|path| fs::read_to_string(format!("/sys/fs/cgroup/{path}")).ok())
}

/// Bytes of memory in all, and available.
pub fn memory() -> Option<(u64, u64)> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
    };
    Some((field("MemTotal:")?, field("MemAvailable:")?))
}

/// Whether the system gives huge pages: "always", "madvise" or "never".
pub fn huge_pages() -> Option<String> {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// Threads that wanted to run in the last minute.
pub fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}
