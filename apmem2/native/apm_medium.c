/* apm_medium.c - what is this file on, and what does a completed sync mean there?
 *
 * POWER_LOSS only for file systems that are known to honour a sync, with barriers on; NONE where nothing can
 * survive; UNKNOWN for everything that we cannot see through (promise 6). */
#include "apm_internal.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

static const struct {
    uint32_t magic;
    uint32_t durability;
    bool coherent;
    bool one_flush; /* see apm.h; of the others it is not known, and btrfs (copy on write) does not */
} file_systems[] = {
    {0x0000EF53, APM_DURABILITY_POWER_LOSS, true, true},  /* ext2, ext3, ext4 */
    {0x58465342, APM_DURABILITY_POWER_LOSS, true, true},  /* xfs */
    {0x9123683E, APM_DURABILITY_POWER_LOSS, true, false}, /* btrfs */
    {0xF2F52010, APM_DURABILITY_POWER_LOSS, true, false}, /* f2fs */
    {0xCA451A4E, APM_DURABILITY_POWER_LOSS, true, false}, /* bcachefs */
    {0x3153464A, APM_DURABILITY_POWER_LOSS, true, false}, /* jfs */
    {0x01021994, APM_DURABILITY_NONE, true, false},       /* tmpfs */
    {0x858458F6, APM_DURABILITY_NONE, true, false},       /* ramfs */
    {0x958458F6, APM_DURABILITY_NONE, false, false},      /* hugetlbfs: no write() */
};
#define OVERLAY_MAGIC 0x794C7630u

static void classify(uint64_t magic, struct apm_medium *out) {
    out->file_system = magic;
    out->durability = APM_DURABILITY_UNKNOWN;
    out->coherent = false;
    out->range_sync = false;
    out->one_flush = false;
    for (size_t i = 0; i < sizeof file_systems / sizeof *file_systems; i++)
        if (file_systems[i].magic == (uint32_t)magic) {
            out->durability = file_systems[i].durability;
            out->coherent = out->range_sync = file_systems[i].coherent;
            out->one_flush = file_systems[i].one_flush;
        }
}

/* Is word one of the comma-separated words of options? */
static bool has_option(const char *options, const char *word) {
    size_t length = strlen(word);
    for (const char *at = options; at && *at; at = strchr(at, ','), at = at ? at + 1 : NULL)
        if (strncmp(at, word, length) == 0 && (at[length] == 0 || at[length] == ',' || at[length] == '\n'))
            return true;
    return false;
}

/* The super-block options of the mount that fd lies on, in a buffer to be freed; NULL when they cannot be read. */
static char *mount_options(int fd) {
    char path[64], *line = NULL, *options = NULL;
    size_t room = 0;
    long mount = -1;
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
    FILE *stream = fopen(path, "re");
    if (!stream)
        return NULL;
    while (getline(&line, &room, stream) > 0)
        if (sscanf(line, "mnt_id: %ld", &mount) == 1)
            break;
    fclose(stream);
    stream = mount < 0 ? NULL : fopen("/proc/self/mountinfo", "re");
    while (stream && !options && getline(&line, &room, stream) > 0) {
        char *separator = strstr(line, " - ");
        if (!separator || strtol(line, NULL, 10) != mount)
            continue;
        char *last = strrchr(separator, ' '); /* "- type source options" */
        options = last ? strdup(last + 1) : NULL;
    }
    if (stream)
        fclose(stream);
    free(line);
    if (options)
        options[strcspn(options, "\n")] = 0;
    return options;
}

/* An overlay writes into its upper directory; from inside a container that is often out of sight. */
static void classify_overlay(char *options, struct apm_medium *out) {
    out->coherent = true; /* after the copy-up that opening for writing does, all goes to one inode */
    out->durability = APM_DURABILITY_UNKNOWN;
    if (has_option(options, "volatile") || has_option(options, "fsync=volatile")) {
        out->durability = APM_DURABILITY_NONE;
        return;
    }
    char *upper = strstr(options, "upperdir=");
    if (!upper)
        return;
    upper += strlen("upperdir=");
    upper[strcspn(upper, ",")] = 0;
    struct statfs below;
    struct apm_medium medium;
    if (statfs(upper, &below) == 0) {
        classify((uint64_t)below.f_type, &medium);
        out->durability = medium.durability;
    }
}

void apm_medium_of(int fd, struct apm_medium *out) {
    struct statfs about;
    if (fstatfs(fd, &about) != 0) {
        classify(0, out);
        return;
    }
    classify((uint64_t)about.f_type, out);
    bool overlay = (uint32_t)about.f_type == OVERLAY_MAGIC;
    if (!overlay && out->durability != APM_DURABILITY_POWER_LOSS)
        return;
    char *options = mount_options(fd);
    if (!options) { /* no /proc: the file system's own word stands */
        out->one_flush = false;
        return;
    }
    if (has_option(options, "data=journal")) /* pages reach their place through the journal, in its own time */
        out->one_flush = false;
    if (overlay)
        classify_overlay(options, out);
    else if (has_option(options, "nobarrier") || has_option(options, "barrier=0") ||
             has_option(options, "fsync_mode=nobarrier")) /* the last is f2fs's word */
        out->durability = APM_DURABILITY_UNKNOWN;
    free(options);
}

/* eADR: caches are inside the power-fail domain of every region (persistence_domain is "cpu_cache"). */
bool apm_has_eadr(void) {
    DIR *directory = opendir("/sys/bus/nd/devices");
    if (!directory)
        return false;
    unsigned regions = 0, in_cache = 0;
    struct dirent *entry;
    while ((entry = readdir(directory)) != NULL) {
        if (strncmp(entry->d_name, "region", 6) != 0)
            continue;
        char path[320], word[32] = "";
        snprintf(path, sizeof path, "/sys/bus/nd/devices/%s/persistence_domain", entry->d_name);
        FILE *stream = fopen(path, "re");
        if (stream && !fgets(word, sizeof word, stream))
            word[0] = 0;
        if (stream)
            fclose(stream);
        regions++;
        in_cache += strncmp(word, "cpu_cache", 9) == 0;
    }
    closedir(directory);
    return regions > 0 && in_cache == regions;
}

uint32_t apm_granted_granularity(bool map_sync) {
    if (!map_sync || !apm_cpu()->can_flush)
        return APM_PAGE;
    return apm_has_eadr() ? APM_BYTE : APM_CACHE_LINE;
}

int apm_forced_granularity(void) {
    const char *word = getenv("PMEM2_FORCE_GRANULARITY");
    if (!word)
        return -1;
    if (strcasecmp(word, "BYTE") == 0)
        return APM_BYTE;
    if (strcasecmp(word, "CACHE_LINE") == 0 || strcasecmp(word, "CACHELINE") == 0)
        return APM_CACHE_LINE;
    return strcasecmp(word, "PAGE") == 0 ? APM_PAGE : -1;
}
