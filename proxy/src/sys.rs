//! What has no safe interface.
#![allow(unsafe_code, reason = "glibc has no safe form of malloc_trim")]

/// Gives memory that big, short work has used back to the system: the allocator keeps it otherwise,
/// and a node that has compared 50,000 Services once would hold twice what it needs.
pub fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim has no preconditions; it may be called from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
