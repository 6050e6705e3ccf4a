# ww completion for fish
function _ww_completion
    set -l response (env _WW_COMPLETE=complete_fish COMP_WORDS=(commandline -cp | string collect) \
        COMP_CWORD=(commandline -ct | string collect) ww 2>/dev/null | string match -r '.+')
    if test (count $response) -gt 0
        printf '%s\n' $response
    else
        __fish_complete_path (commandline -ct)
    end
end
complete --command ww --no-files --arguments '(_ww_completion)'
